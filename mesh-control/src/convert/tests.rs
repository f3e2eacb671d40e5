mod policies;
mod services;
mod waypoints;
mod workloads;
