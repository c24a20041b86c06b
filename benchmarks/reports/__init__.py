"""What is made of results: pictures, the roofline page, a summary."""
