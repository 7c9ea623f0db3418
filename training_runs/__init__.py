"""What starts training: recipes, policy training, deployment, comparison, benchmarks."""
