"""The last stage: order a short list for the whole page."""
