"""Work on Ray that ends: training, search, jobs; and the stores they share with serving."""
