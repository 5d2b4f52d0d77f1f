//! Timed locks with fencing tokens: a pure table of who holds and who waits, the actor around it, and the guard that users hold.

mod cycle;
mod table;
