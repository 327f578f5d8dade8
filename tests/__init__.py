"""Every test of Rayfunnel."""
