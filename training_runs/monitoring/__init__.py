"""Prometheus and Grafana for governed runs: configuration, alert rules, and the dashboard, generated from the metrics."""
