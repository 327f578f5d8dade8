"""The pure recommender: data, features, recall, models, re-rank, evaluation. No Ray, no Redis, no network."""
