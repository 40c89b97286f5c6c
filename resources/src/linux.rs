//! The recipe for Linux images, `linux/build-debian`, and what it puts into them.

/// The name of the recipe's script among [`RECIPE`].
pub const RECIPE_SCRIPT: &str = "build-debian";

/// The name of the agent among [`RECIPE`].
pub const RECIPE_AGENT: &str = "cloudlet-agent";

/// The recipe's files: name, mode and contents. They belong into one directory.
pub const RECIPE: &[(&str, u32, &[u8])] = &[
    (
        RECIPE_SCRIPT,
        0o755,
        include_bytes!("../linux/build-debian"),
    ),
    ("init", 0o755, include_bytes!("../linux/init")),
    ("network", 0o755, include_bytes!("../linux/network")),
    ("initrd-init", 0o755, include_bytes!("../linux/initrd-init")),
    (RECIPE_AGENT, 0o755, crate::AGENT_ELF),
    (
        "cloudlet-agent.service",
        0o644,
        crate::AGENT_SERVICE.as_bytes(),
    ),
    (
        "cloudlet-network.service",
        0o644,
        include_bytes!("../linux/cloudlet-network.service"),
    ),
];
