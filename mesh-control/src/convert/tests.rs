mod destinations;
mod policies;
mod services;
mod virtual_services;
mod waypoints;
mod workloads;
