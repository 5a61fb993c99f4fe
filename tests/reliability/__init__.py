"""A harness that interrupts and starves fasttrain and feeds it damaged files. Run `make test-reliability`."""
