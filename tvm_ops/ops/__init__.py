"""The operators in TE, one a file: the computation, its shapes and its constants. How it runs is `schedule_cpu`'s."""
