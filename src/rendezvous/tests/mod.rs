mod store;
mod world;
