"""The page of an X-ray report: one HTML file that needs nothing from elsewhere."""
