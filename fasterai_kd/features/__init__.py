"Features of named layers, and modules that bring them to one shape."
