"""`graddot scores`: what a run's scores say."""
