"""What an exported folder holds besides weights: code that needs torch and diffusers alone."""
