//! Lowers the syntax tree to executable ops: names become register indices, immediates
//! become constant registers, opcodes become [`Op`]s. An opcode that is not known is an error.

mod arith;
mod asynchronous;
mod control;
mod convert;
mod memory;
mod operands;
mod tensor;

use std::collections::HashMap;

use super::ParseError;
use super::ast::{self, Instruction, Operand, SourceLocation, Space, Statement, Type, Variable};
use super::ops::{AnyReg, Class, FixedSpecial, Inst, Op, Reg};
use super::program::{FUNCTION_WINDOW, Function, PARAM_WINDOW, Program, SHARED_WINDOW};

/// Errors of lowering one instruction; the line is added by the caller.
type Result<T> = std::result::Result<T, String>;

/// Registers of one file a function may declare.
const MAX_REGISTERS: u32 = 1 << 20;
/// Bytes of static shared memory of a kernel, of local memory of a function, of parameters.
const MAX_STATIC_SHARED: u32 = 48 << 10;
const MAX_LOCAL: u32 = 512 << 10;
const MAX_PARAMS: u32 = 32_764;

#[derive(Clone, Copy)]
enum Symbol {
    Register(AnyReg),
    Predicate(Reg),
    /// Offset in shared memory.
    Shared(u32),
    /// Offset in the frame's local memory.
    Local(u32),
    /// Offset in the kernel's parameter bank.
    Param(u32),
}

/// Module-wide facts while functions are lowered.
struct Shared<'m> {
    module: &'m ast::Module,
    globals: &'m HashMap<String, (u64, u64)>,
    function_index: HashMap<&'m str, usize>,
    /// Module-scope shared variables: offsets, and their total size.
    shared: HashMap<&'m str, u32>,
    shared_size: u32,
    dynamic: Vec<&'m Variable>,
}

/// Lowers a parsed module whose global variables already have addresses (address, size).
///
/// # Errors
/// Unknown opcodes, operands of the wrong kind, undefined names: with function and line.
pub fn lower(
    module: &ast::Module,
    globals: HashMap<String, (u64, u64)>,
    text: &str,
) -> std::result::Result<Program, ParseError> {
    let defined: Vec<&ast::Function> = module
        .functions
        .iter()
        .filter(|f| f.body.is_some())
        .collect();
    let function_index = defined
        .iter()
        .enumerate()
        .map(|(i, f)| (f.name.as_str(), i))
        .collect();
    let mut shared = Shared {
        module,
        globals: &globals,
        function_index,
        shared: HashMap::new(),
        shared_size: 0,
        dynamic: Vec::new(),
    };
    for variable in module.variables.iter().filter(|v| v.space == Space::Shared) {
        if variable.size == 0 {
            shared.dynamic.push(variable);
        } else {
            let offset = place(&mut shared.shared_size, variable)?;
            shared.shared.insert(&variable.name, offset);
        }
    }
    let mut functions = Vec::with_capacity(defined.len());
    for function in &defined {
        functions.push(
            FunctionLowering::new(&shared, function)
                .run(function)
                .map_err(|mut e| {
                    e.function = Some(function.name.clone());
                    e
                })?,
        );
    }
    let entries = functions.iter().enumerate().filter(|(_, f)| f.is_entry);
    let kernels = entries.map(|(i, f)| (f.name.clone(), i)).collect();
    Ok(Program {
        functions,
        kernels,
        globals,
        files: module.files.clone(),
        version: module.version,
        target: module.target,
        lines: text.lines().map(str::to_string).collect(),
    })
}

/// Address of a device function as a generic pointer.
pub fn function_address(module: &ast::Module, name: &str) -> Option<u64> {
    let mut defined = module.functions.iter().filter(|f| f.body.is_some());
    defined
        .position(|f| f.name == name)
        .map(|i| FUNCTION_WINDOW + ((i as u64 + 1) << 4))
}

/// Reserves room for a variable; returns its offset.
fn place(size: &mut u32, variable: &Variable) -> std::result::Result<u32, ParseError> {
    let start = u64::from(*size).next_multiple_of(variable.align.max(1));
    let end = start + variable.size;
    *size = u32::try_from(end).map_err(|_| {
        ParseError::at(
            variable.line,
            format!(
                "variable {} is too large: {} bytes",
                variable.name, variable.size
            ),
        )
    })?;
    Ok(start as u32)
}

pub(super) struct FunctionLowering<'m> {
    shared: &'m Shared<'m>,
    scopes: Vec<HashMap<String, Symbol>>,
    /// What `.param` variables of this body are: bank offsets in a kernel's parameter list,
    /// local memory otherwise.
    out: Function,
    constants32: HashMap<u32, Reg>,
    constants64: HashMap<u64, Reg>,
    specials: HashMap<(FixedSpecial, bool), AnyReg>,
    labels: HashMap<String, u32>,
    branch_targets: HashMap<String, Vec<String>>,
    /// Code index, label and line of branches to resolve at the end.
    fixups: Vec<(usize, Vec<String>, u32)>,
    dynamic_align: u64,
    line: u32,
}

impl<'m> FunctionLowering<'m> {
    fn new(shared: &'m Shared<'m>, function: &ast::Function) -> Self {
        let out = Function {
            name: function.name.clone(),
            is_entry: function.is_entry,
            max_threads: function.max_threads,
            required_threads: function.required_threads,
            cluster: function.cluster,
            shared_size: shared.shared_size,
            ..Function::default()
        };
        Self {
            shared,
            scopes: vec![HashMap::new()],
            out,
            constants32: HashMap::new(),
            constants64: HashMap::new(),
            specials: HashMap::new(),
            labels: HashMap::new(),
            branch_targets: HashMap::new(),
            fixups: Vec::new(),
            dynamic_align: 16,
            line: function.line,
        }
    }

    fn run(mut self, function: &ast::Function) -> std::result::Result<Function, ParseError> {
        self.parameters(function)?;
        let body = function.body.as_deref().unwrap_or(&[]);
        self.place_shared(body)?;
        for statement in body {
            self.statement(statement)?;
        }
        self.emit(Op::Return, None, Class::Control);
        self.resolve_branches()?;
        self.out.local_size = self.out.local_size.min(u32::MAX - 15).next_multiple_of(16);
        self.check_sizes(function)?;
        Ok(self.out)
    }

    /// The limits that ptxas enforces.
    fn check_sizes(&self, function: &ast::Function) -> std::result::Result<(), ParseError> {
        let limits = [
            (
                "static shared memory",
                self.out.shared_size,
                MAX_STATIC_SHARED,
            ),
            ("local memory", self.out.local_size, MAX_LOCAL),
            ("parameters", self.out.param_bytes, MAX_PARAMS),
        ];
        for (what, size, limit) in limits {
            if size > limit {
                return Err(ParseError::at(
                    function.line,
                    format!("{size} bytes of {what}, more than {limit}"),
                ));
            }
        }
        Ok(())
    }

    fn parameters(&mut self, function: &ast::Function) -> std::result::Result<(), ParseError> {
        let mut size = 0;
        for variable in &function.params {
            let offset = place(&mut size, variable)?;
            let symbol = if function.is_entry {
                Symbol::Param(offset)
            } else {
                Symbol::Local(offset)
            };
            self.scopes[0].insert(variable.name.clone(), symbol);
            self.out.params.push((offset, variable.size as u32));
        }
        self.out.param_bytes = size;
        if !function.is_entry {
            self.out.local_size = size;
            for variable in &function.returns {
                let offset = place(&mut self.out.local_size, variable)?;
                self.scopes[0].insert(variable.name.clone(), Symbol::Local(offset));
                self.out.returns.push((offset, variable.size as u32));
            }
        }
        Ok(())
    }

    /// Shared variables first: dynamic shared memory lies behind all of them.
    fn place_shared(&mut self, body: &[Statement]) -> std::result::Result<(), ParseError> {
        for statement in body {
            if let Statement::Variable(v) = statement
                && v.space == Space::Shared
                && v.size > 0
            {
                let offset = place(&mut self.out.shared_size, v)?;
                self.scopes[0].insert(v.name.clone(), Symbol::Shared(offset));
            }
        }
        let declared = self.shared.dynamic.iter().map(|v| v.align).max();
        self.dynamic_align = declared.unwrap_or(1).max(16);
        let start = u64::from(self.out.shared_size).next_multiple_of(self.dynamic_align);
        self.out.dynamic_shared = u32::try_from(start)
            .map_err(|_| ParseError::at(self.line, "shared variables are too large"))?;
        for variable in &self.shared.dynamic {
            self.scopes[0].insert(
                variable.name.clone(),
                Symbol::Shared(self.out.dynamic_shared),
            );
        }
        Ok(())
    }

    fn statement(&mut self, statement: &Statement) -> std::result::Result<(), ParseError> {
        match statement {
            Statement::OpenScope => self.scopes.push(HashMap::new()),
            Statement::CloseScope => drop(self.scopes.pop()),
            Statement::Label(name) => {
                let here = self.out.code.len() as u32;
                // Labels of inline assembly are unique by construction (%=); scoping is not needed.
                self.labels.insert(name.clone(), here);
            }
            Statement::Registers(ty, names) => {
                for (name, count) in names {
                    self.declare(*ty, name, *count)
                        .map_err(|m| ParseError::at(self.line, m))?;
                }
            }
            Statement::Variable(variable) => self.variable(variable)?,
            Statement::Location(location) => self.location(location),
            Statement::BranchTargets(name, targets) => {
                self.branch_targets.insert(name.clone(), targets.clone());
            }
            Statement::Instruction(instruction) => {
                self.line = instruction.line;
                self.instruction(instruction).map_err(|message| {
                    let opcode = instruction.opcode();
                    ParseError::at(instruction.line, format!("{message} in `{opcode}`"))
                })?;
            }
        }
        Ok(())
    }

    fn variable(&mut self, variable: &Variable) -> std::result::Result<(), ParseError> {
        if variable.space == Space::Shared && variable.size > 0 {
            return Ok(());
        }
        let symbol = match variable.space {
            Space::Shared => Symbol::Shared(self.out.dynamic_shared),
            Space::Local | Space::Param => {
                Symbol::Local(place(&mut self.out.local_size, variable)?)
            }
            _ => {
                let message = format!("variable {} in an unsupported state space", variable.name);
                return Err(ParseError::at(variable.line, message));
            }
        };
        let scope = self.scopes.len() - 1;
        self.scopes[scope].insert(variable.name.clone(), symbol);
        Ok(())
    }

    fn location(&mut self, location: &SourceLocation) {
        if self.out.locations.last() != Some(location) {
            self.out.locations.push(location.clone());
        }
    }

    fn declare(&mut self, ty: Type, name: &str, count: Option<u32>) -> Result<()> {
        let total = self.out.regs32.max(self.out.regs64).max(self.out.preds);
        if count.unwrap_or(1).saturating_add(total) > MAX_REGISTERS {
            return Err(format!("more than {MAX_REGISTERS} registers"));
        }
        let names = match count {
            Some(n) => (0..n).map(|i| format!("{name}{i}")).collect(),
            None => vec![name.to_string()],
        };
        for name in names {
            let symbol = match ty.bits() {
                1 => Symbol::Predicate(self.new_pred()),
                128 => return Err("128-bit registers are not supported".into()),
                bits => Symbol::Register(self.new_reg(bits == 64)),
            };
            let scope = self.scopes.len() - 1;
            self.scopes[scope].insert(name, symbol);
        }
        Ok(())
    }

    fn new_reg(&mut self, wide: bool) -> AnyReg {
        let counter = if wide {
            &mut self.out.regs64
        } else {
            &mut self.out.regs32
        };
        *counter += 1;
        AnyReg {
            index: *counter - 1,
            wide,
        }
    }

    fn new_pred(&mut self) -> Reg {
        self.out.preds += 1;
        self.out.preds - 1
    }

    fn emit(&mut self, op: Op, guard: Option<(Reg, bool)>, class: Class) {
        let location = (self.out.locations.len() as u32).wrapping_sub(1);
        self.out.code.push(Inst {
            op,
            guard,
            class,
            line: self.line,
            location,
        });
    }

    fn instruction(&mut self, i: &Instruction) -> Result<()> {
        let guard = match &i.guard {
            Some((name, negated)) => Some((self.pred(&Operand::Name(name.clone()))?, *negated)),
            None => None,
        };
        let (op, class) = self.operation(i)?;
        self.emit(op, guard, class);
        Ok(())
    }

    fn operation(&mut self, i: &Instruction) -> Result<(Op, Class)> {
        let families = [
            Self::arithmetic,
            Self::conversion,
            Self::memory_access,
            Self::control_flow,
            Self::warp_matrix,
            Self::asynchronous,
        ];
        for family in families {
            if let Some(found) = family(self, i)? {
                return Ok(found);
            }
        }
        Err("unknown opcode".into())
    }

    fn resolve_branches(&mut self) -> std::result::Result<(), ParseError> {
        for (index, names, line) in std::mem::take(&mut self.fixups) {
            let find = |name: &String| {
                let found = self.labels.get(name).copied();
                found.ok_or_else(|| ParseError::at(line, format!("undefined label {name}")))
            };
            let resolved = names
                .iter()
                .map(find)
                .collect::<std::result::Result<Vec<_>, _>>()?;
            match &mut self.out.code[index].op {
                Op::Branch { to } => *to = resolved[0],
                Op::BranchIndex { targets, .. } => *targets = resolved,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Operand number `n`.
fn operand(i: &Instruction, n: usize) -> Result<&Operand> {
    i.operands
        .get(n)
        .ok_or_else(|| format!("operand {} is missing", n + 1))
}

/// The last modifier, as a type.
fn last_type(i: &Instruction) -> Result<Type> {
    let name = i.parts.last().map_or("", String::as_str);
    Type::parse(name).ok_or_else(|| format!("unknown type `.{name}`"))
}

/// A number given as an immediate.
fn immediate(o: &Operand) -> Result<u64> {
    match o {
        Operand::Int(v) => Ok(*v),
        other => Err(format!("expected a constant, found {other:?}")),
    }
}

/// Base added to an address of this space to make it generic.
pub fn window(space: Space) -> u64 {
    match space {
        Space::Shared | Space::Cluster => SHARED_WINDOW,
        Space::Local => super::program::LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        _ => 0,
    }
}
