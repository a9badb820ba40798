"""What training of the VQ autoencoder is made of besides its steps: its images, and its saved state."""
