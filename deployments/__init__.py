"""Ray Serve: one file per funnel stage, and the HTTP edge."""
