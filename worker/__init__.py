"""The side of the queue that runs jobs: the Celery binding, the supervisor of one run, and the sweep."""
