"""The torch-side halves of a run: what entries are handed, and what they hand back."""
