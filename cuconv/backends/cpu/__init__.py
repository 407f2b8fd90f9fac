"""The backend over NumPy."""
