"""What a model needs and could reach on devices that are not here: estimated, and told by their compilers."""
