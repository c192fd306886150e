"""What every layer of a model knows, measured without training: `inspection` is where it begins."""
