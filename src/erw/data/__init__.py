"""Sources of images, the cache of latents and features, and what reads it."""
