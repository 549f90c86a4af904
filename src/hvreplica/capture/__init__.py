"""Live tracking: serve a disk to its hypervisor over NBD and see every write."""
