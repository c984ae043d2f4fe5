"""The name under which other programs import reading and writing of networks; the code is in formats.network_files."""

from formats.network_files import NetworkFile as NetworkFile
from formats.network_files import load_network as load_network
from formats.network_files import save_network as save_network
