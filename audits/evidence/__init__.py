"""What a run's folder proves, as frozen facts: for the curve, the report and the comparison."""
