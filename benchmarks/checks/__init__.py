"""What is compared with others' models, tools and mathematics, and takes too long for a test."""
