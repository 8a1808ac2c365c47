import os

__version__ = "0.1.0"

# How often a thread looks for another one before it sleeps. GNU's OpenMP reads it when PyTorch is
# imported, and takes 300000 by itself: so long that on busy cores a frame takes a second.
if 'OMP_WAIT_POLICY' not in os.environ: os.environ.setdefault('GOMP_SPINCOUNT', '3000')
