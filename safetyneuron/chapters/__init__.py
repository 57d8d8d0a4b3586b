"""What one chapter alone needs: its experiment, its tables, its figures and its sentences."""
