"""Section ``performance``: fast kernels checked on the device, decided and put into effect."""
