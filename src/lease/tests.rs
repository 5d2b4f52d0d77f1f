//! The room through its door: what a caller, a crash, a slow storage and another process can do to a lock.

mod book;
mod rows;
mod world;
