//! Every kernel against a naive computation in f64, on every instruction set this processor has.

mod attention;
mod attention_rules;
mod attention_tree;
mod backward;
mod divergence;
mod grouped;
mod isa;
mod kv;
mod limits;
mod linalg;
mod matmul;
mod ops;
mod random;
