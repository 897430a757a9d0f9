"""The rank grid, the process groups, and the vocabulary split over ranks."""
