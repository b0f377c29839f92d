"""What each weight costs, which stay under a pattern and a budget, and how those that stay move: for any curvature."""
