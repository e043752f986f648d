"""What the scripts share. Nothing is imported here, so that each script loads only what it needs."""
