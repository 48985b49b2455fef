"""What a model is worth: its ELBO, bounds on its likelihood, the quality of its images, pictures and a report."""
