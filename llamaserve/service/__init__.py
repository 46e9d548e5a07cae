"""Living as a service: started at login or boot, started again after a crash, and telling its manager how it is."""
