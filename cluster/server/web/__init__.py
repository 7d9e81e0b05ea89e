"""The dashboard: pages over the records of runs.

The front end is plain ES modules without a build step: nothing is installed to change it, and what is served is what is
read.
"""
