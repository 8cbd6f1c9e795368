"""Head-pages, lanes and grants: who holds which memory, on the worker and in the scheduler."""
