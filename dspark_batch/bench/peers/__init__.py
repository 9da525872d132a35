"""Other engines on the same prompts, weights and dtype, each in an environment and a process of its own.

A peer is a child process that speaks JSON lines: the first line it reads is its set-up, every further line a job of
token-id prompts; it answers each line with one line. The peers' scripts import nothing of this project, because they
run where it is not installed. ``run`` drives them in turn.
"""
