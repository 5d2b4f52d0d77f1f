//! The public test kit that every backend must pass.
