"""Raw bytes to latents, and stored latents to training windows. Does not import Ray."""
