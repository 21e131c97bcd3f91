mod crowd;
mod store;
mod world;
