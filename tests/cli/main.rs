//! The program as its users run it: whole runs on the small models of the fixtures, interrupted,
//! killed, resumed, refused, and what they leave.

mod support;

mod bench;
mod cuda;
mod doctor;
mod equivalence;
mod evaluate;
mod examples;
mod faults;
mod features;
mod folder;
mod generate;
mod generation;
mod hub;
mod outputs;
mod pipes;
mod plan;
mod report;
mod resume;
#[cfg(unix)]
mod signals;
