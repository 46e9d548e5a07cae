"""Pictures: reading uploaded ones, generating new ones with stable-diffusion.cpp, and writing them as files."""
