"""`kinodit doctor`: is this machine, or are the nodes of a job, fit to train?"""
