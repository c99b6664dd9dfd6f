"""Teachers and students, and the fixed features in front of them."""
