"""What we measure. `bench/README.md` lists the figures, their bounds and how to take them."""
