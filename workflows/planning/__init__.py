"""What a configuration will take, before it is run: memory, time, traffic, storage, cost."""
